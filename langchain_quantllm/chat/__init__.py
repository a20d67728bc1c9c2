"""The parts of the chat model: options, prompts by chat templates, parsers of answers, results."""
