"""From files of source code to batches of token ids. Modules in the order a byte passes them:

Reading
    documents      Document, language of a file name, Report (what was kept, what was not and why)
    sources        read_sources: folders, git checkouts, JSONL (.gz, .zst), Parquet
    filters        Filters: the basic quality filters of StarCoder
Writing
    formats        starcoder, starcoder2_repository: documents to text and special-token markers
    tokenizer      Tokenizer: byte-level BPE of both generations, trained and loaded
    shards         ShardWriter, Shard: Megatron's .bin/.idx
    prepare        prepare: all of the above, from source code to shards and a held-out set
Training
    fim            fill-in-the-middle
    permutation    shuffles, random streams and blending, by key
    packing        PackedDataset: rows as a pure function of (seed, index)
    batches        Batches: rows of one rank as tensors; the only module here that needs torch

Import what is needed from its module; this package imports nothing.
"""
