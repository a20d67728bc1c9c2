"""`python -m langchain_quantllm.cli`."""

from langchain_quantllm.cli import app

if __name__ == "__main__":
    app()
