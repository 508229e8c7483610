"""Towers measured without a language model: zero-shot classification, retrieval, linear probe and kNN, from local files.

Read in this order: `config` (what can be asked for), `sets` (pictures with classes or captions), `embedders` (any tower as
pictures and texts → vectors), `features` (the vectors, kept), `probes` (linear probe and kNN), `run` (the whole), `table` (towers
side by side). Imports no torch.
"""
