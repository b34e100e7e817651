"""Measuring policies: rewards, likelihoods, generations, and the report on them.

- `intervals`, `rewards`: means, paired differences, win rates, gap closed;
- `generation`: sampling on a prompt set, diversity of the texts;
- `likelihood`: divergences from the teacher, fluency;
- `content`, `report`: what a report says, and how it is written.
"""
