"""What compiling costs, and what it saves: ratios, each measured within one run.

python -m benchmarks [compile | localize | serving | all] [options]
"""
