"""Uses of what transformers, peft, accelerate, bitsandbytes and gptqmodel do not promise, one module for each subject.

Each module has a test of its name that looks at the library itself, so that a release which changes such a thing
fails there, by name. No other module imports or reads these things.
"""
