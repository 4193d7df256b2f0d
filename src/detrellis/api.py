"""The Python interface: the same verbs and words as the command line, returning typed results."""

from __future__ import annotations

from detrellis.engine.bench import parse_size as parse_size
from detrellis.exporting.run import export as export
from detrellis.hub.push import push as push
from detrellis.interop.convert import convert as convert
from detrellis.loading import load as load
from detrellis.predictions.model import Model as Model
from detrellis.predictions.record import Prediction as Prediction
from detrellis.verbs.evaluation import evaluate as evaluate
from detrellis.verbs.networks import bench as bench
from detrellis.verbs.networks import info as info
from detrellis.verbs.prediction import predict as predict
from detrellis.verbs.serving import serve as serve
from detrellis.verbs.training import draw_samples as draw_samples
from detrellis.verbs.training import resume as resume
from detrellis.verbs.training import train as train
