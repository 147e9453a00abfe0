"""Work spread over processes and machines by Ray: workers that can die, engines that they share, results that add up.

Workers are Ray actors, each with a core of its own (or a GPU); each gets a function once, as it is pickled, and then
portions of the items. Models that need a GPU are *hosted*: one actor a GPU holds one, and a proxy in each worker sends
it arrays through Ray's shared memory.

Exactly once: a portion counts when its result has come back here, and no portion comes back twice. What a portion
writes must therefore be the same when it is written again, and whole (``write_atomically``). A portion whose worker
died is given to another, then cut into single items; an item that fails so too is tried once more, with nothing beside
it that could be to blame, and then reported as lost.
"""
