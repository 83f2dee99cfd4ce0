"""Our shards made of what people have: records of files and tables, read in any layout, written in parallel.

Entry points: run.convert, run.Request. The result is a function of the inputs, the layout and the shard size,
not of the number of workers or of how often it was killed and started again.
"""
