"""The frontier study: what every method keeps of a post-trained model, against what it gains in new languages.

`material` and `family` say what is trained on and what comes out; `methods` has an entry for each method; `runs` trains
and scores one of them, `study` all of them; `curves`, `intervals`, `tables` and `pictures` read the scores alone.
The script is `evidence.py` beside this folder, the protocol is in docs/evidence.md.
"""
