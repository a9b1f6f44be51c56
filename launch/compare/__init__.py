"""`shardtune compare`: sets runs side by side, from the files in their directories. Needs no torch.

Five terms, from small to large:

- A *run* is one training run with a directory of its own (`RecordedRun`).
- A *repeat* is one of several runs with the same settings and the same seed: `compare.repeats=3` makes three of each point.
- A *point* is one combination of settings, and one row of every table (`ComparedPoint`). It has one run, or one for each repeat.
- A *job* is all points that train the same: their settings differ in nothing but seed, strategy and what else changes only where
  and how fast a step is computed (`ComparedJob`). Points of one job and one seed must have the same loss.
- A *pair* is two points or two jobs, the first of them the baseline.
"""
