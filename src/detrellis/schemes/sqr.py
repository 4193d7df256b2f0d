"""SQR: selective query recollection (Chen et al., CVPR 2023):
later layers learn from what earlier ones handed on, too.

A decoder's later layers are to correct what the earlier ones got wrong, yet they are trained on one
pass, in which a query that was right may have been made worse. Here layer l also gets the sets of
queries that layer l - 2 handed on, as they were: 1, 2, 3, 5, 8, 13 sets in six layers, each matched
and learned for itself by the heads of its layer. One of them is the detector's own pass; the others
exist in training only.

| deviation from the released code | why |
| --- | --- |
| the sets of a layer stand side by side as copies of a block; there in the batch, with the memory as often | equal |
| denoising and other extra queries are not recollected | the paper has none |
"""

from __future__ import annotations

from collections.abc import Mapping

from detrellis.nn.decoder import Decoder
from detrellis.schemes.base import Step, TrainingScheme
from detrellis.schemes.config import SQRConfig
from detrellis.supervision import Task
from detrellis.types import DecoderOutput, Passed


class SQR(TrainingScheme):
    """The detector's queries once more through the layers that come two after those that handed
    them on.
    """

    name = "sqr"
    requires = frozenset({"sigmoid_scores", "plain_layers"})

    def __init__(self, config: SQRConfig) -> None:
        super().__init__()
        self.config = config

    def after(self, step: Step, outputs: Mapping[str, DecoderOutput]) -> list[Task]:
        """What each layer from the second on makes of the sets that are not the main one."""
        decoder, passed = step.detector.decoder, outputs["main"].passed
        assert isinstance(decoder, Decoder)
        normaliser, tasks = step.mean_boxes.clamp(min=1), []
        # What the layer before the last one handed on, and the last one; the main set is the last
        # of each.
        older = [Passed(step.queries.content, step.queries.boxes, step.queries.boxes)]
        newer = [passed[0]]
        for i in range(1, len(passed)):
            sets = [*older, *newer[:-1]]
            output, handed_on = decoder.again(i, sets, step.queries, step.memory)
            older, newer = newer, [*handed_on, passed[i]]
            last = i == len(passed) - 1
            supervision = step.supervision if last else step.supervision.initial(len(passed))
            arguments = (output, step.targets, normaliser, len(sets), self.config.weight)
            tasks.append(supervision.task(f"sqr{i}", *arguments))
        return tasks
