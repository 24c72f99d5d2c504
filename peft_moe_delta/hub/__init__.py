"""Publishing: a model card made from what is known, and everything to the Hub in one commit."""

from .card import CardFacts, render_card, write_card
from .licence import licence_for, licence_of
from .push import push_to_hub

__all__ = ["CardFacts", "licence_for", "licence_of", "push_to_hub", "render_card", "write_card"]
