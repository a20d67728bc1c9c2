"""Engines: what turns token ids into a stream of text chunks, without knowing LangChain."""
