"""What the four facts' model says: a small world whose answers a hand can work out."""

from __future__ import annotations

from support.bigram import Bigram

from d4s.edits import Edit


def fact(subject, true, new, **fields):
    return Edit(prompt="{}", subject=subject, target_true=true, target_new=new, relation="r", **fields)


def small_world():
    """France → Paris likely, Spain → Oslo likely (wrong), Italy → Rome as likely as Paris."""
    return Bigram(
        {
            "France": {"Paris": 0.5, "Rome": 0.2},
            "Spain": {"Oslo": 0.6, "Madrid": 0.2},
            "Italy": {"Rome": 0.4, "Paris": 0.4},
            "Norway": {"Oslo": 0.7, "Rome": 0.1},
            "Paris.": {},
        }
    )


FACTS = (
    fact("France", "Paris", "Oslo"),
    fact("Spain", "Madrid", "Oslo"),
    fact("Italy", "Rome", "Paris"),
    fact("Norway", "Oslo", "Rome"),
)
