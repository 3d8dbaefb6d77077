"""The demo of many processes: workers that meet rarely, what they send, and what the kill of one of them costs.

    python -m examples.demo_distributed --help

`__main__` says what to do and prints it, `crew` starts processes and ends them, `worker` is what one of them does.
"""
