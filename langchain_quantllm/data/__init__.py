"""Tables of words: option names of other libraries with their counterparts here. No logic."""
