"""How much batch work each engine can take now without its interactive requests feeling it.

``board.HeadroomBoard`` is told what happens to requests and answers with a ``wire.PoolHeadroom``; batchgw obeys it
(``batchgw.pace``). The law is a feed-forward one: the step time of an engine is predicted from its load, and batch gets
what is left of a step-time budget. Nothing here has a clock: ``now_s`` is an argument.
"""
