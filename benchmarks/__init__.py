"Speed and memory, each against a baseline in the same run: `python -m benchmarks.NAME --help`."
