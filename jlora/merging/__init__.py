# SPDX-License-Identifier: Apache-2.0
"""Ways of putting weight changes together, one call for all of them.

    method(stack, weights, base=None, *, key=None, **settings) -> array

`stack` (n, ...) holds one parameter of n models, `weights` (n,) a number for
each, `base` (...) the parameter they were all finetuned from. What comes out is
computed in float32 and rounded once to the stack's dtype. Methods of Loras have
the same call with a sequence of n Loras instead of a stack and give a Lora.
`merge` takes any of them over whole models.
"""
