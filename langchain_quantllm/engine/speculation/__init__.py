"""More than one token a step: tokens are proposed, and one step of the model verifies them.

A sequence's next tokens are guessed from its own text and from ended ones (`ngrams`), follow from its grammar
(`TokenMask.forced`), or are proposed by a small model of the same vocabulary (`draft_model`). A verify step
(`verify_steps`) runs the last token and the proposed ones together, draws a token at each position as a step of its own
would (by the sequence's own random number, from the masked probabilities there), and keeps the draws up to the first
one that differs from its proposal. So the text is that of single steps. `Speculator` decides how many tokens are
proposed, by the acceptance so far and the measured time of steps and of draft models.
"""

DRAFTS_ON_GPUS = False
"""Let draft models propose on GPUs: off until their speed has been measured there. The bench and the tests for GPUs
switch it on."""

MOST_MASKED_ON_GPUS = 0
"""Most sequences with a mask in a step on a GPU of which any gets proposals: the host fills a mask for each token, and
for eight sequences that took longer on an H200 than the steps that were saved."""
