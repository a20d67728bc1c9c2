"""Uses of what transformers, peft, accelerate, bitsandbytes and gptqmodel do not promise, one module for each subject.

Each module has a test of the same name that looks at the library itself, so that a release which changes such a thing
fails there, by name. No other module of the package uses these things.
"""
