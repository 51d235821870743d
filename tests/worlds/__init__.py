"""What tests run on, one home for each: tiny shapes and models, model directories, runs, exams, pairs, corpora, ranks.

A test imports helpers from here, or from a helper module of its own folder; never from another test.
"""
