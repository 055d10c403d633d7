"""`d4s revise`: an edit of a journal gets another answer."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from d4s.cli.arguments import (
    add_covariance,
    add_journal,
    add_model,
    add_sums,
    loaded_covariance,
    loaded_model,
)
from d4s.cli.undo import follow

HELP = "give an edit another answer: it is taken back, and one with the new answer is made"


def add(verb: ArgumentParser) -> None:
    add_journal(verb)
    verb.add_argument("id", metavar="ID", help="of the edit, as d4s log lists it")
    verb.add_argument("target_new", metavar="ANSWER", help="what the model is to say")
    add_model(verb)
    add_covariance(verb)
    add_sums(verb)


def run(options: Namespace) -> None:
    from d4s.journal.journal import Journal

    journal = Journal(options.journal)
    model, tokenizer = loaded_model(options)
    new = journal.revise(
        options.id,
        options.target_new,
        model=model,
        tokenizer=tokenizer,
        covariance=loaded_covariance(options, model, tokenizer),
        sums_on=options.sums_on,
    )
    p = journal.log()[-1]["last_probability"]
    follow(
        options,
        journal,
        f"revised: {options.id}, now {new.id}; its search reached a probability of {p:.2f} a token",
    )
