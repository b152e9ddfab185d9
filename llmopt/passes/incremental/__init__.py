"""What `add-kv-cache` has to know before it may let a decoder remember.

`flow` says where the tokens are in each value, `rules` how operators carry them on, `contraction`
where tokens meet each other, `proofs` what values that depend on positions alone have to keep, and
`prelude` computes those for past and new tokens together.
"""
