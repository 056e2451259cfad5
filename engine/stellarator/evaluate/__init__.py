"""What a trained model can do.

defines:
    generate.py    generate: continue token sequences, greedy or sampled
    infilling.py   infill, make_holes, exact_match: text between a prefix and a suffix
"""
