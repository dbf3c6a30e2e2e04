"""dloop at work: a classifier in plain Python, trained on real data. Run `python -m dloop.demo`."""
