"""Sound: decoding files, cutting long ones into pieces, and turning pieces into text. Knows no LangChain."""
