"""After the graft: routers that are fitted to the model they are part of now.

- `calibrate`: routers and gates in closed form and a short review, kept where they are better on held-out text
- `conversations`: what a chat model says in the user's place, so that chat is among what they are fitted to
- `report`: what came of it
"""

from .calibrate import WEIGHTS, calibrate_routers
from .conversations import made_up_conversations
from .report import Calibration, Routed, Trial

__all__ = ["WEIGHTS", "Calibration", "Routed", "Trial", "calibrate_routers", "made_up_conversations"]
