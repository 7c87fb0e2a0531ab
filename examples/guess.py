"""The model finds a number, and is told each time whether to go higher or lower."""

import re

from espl_jax.types import Grade


def guess_in(message):
    numbers = re.findall(r"-?\d+", message["content"])
    return int(numbers[-1]) if numbers else None


class Guess:
    tools = ()  # schemas of functions that the model may call

    def __init__(self, turns=7):
        self.turns = turns

    def user_message(self, problem):
        return f"{problem.text} End each turn with a guess, and I say whether to go higher or lower."

    def respond(self, problem, transcript):
        """What is said next, or None at the end; slow answers may come as futures."""
        guess, guesses = guess_in(transcript[-1]), transcript[::2]
        if guess == int(problem.answer) or len(guesses) == self.turns:
            return None
        hint = "That is no number." if guess is None else "Lower."
        if guess is not None and guess < int(problem.answer):
            hint = "Higher."
        return [{"role": "user", "content": hint}]

    def grade(self, problems, transcripts):
        """The sooner it is found, the better; rewards may be any numbers."""
        return [self.grade_one(*each) for each in zip(problems, transcripts, strict=True)]

    def grade_one(self, problem, transcript):
        guess, guesses = guess_in(transcript[-1]), transcript[::2]
        found = guess == int(problem.answer)
        reward = 1 - (len(guesses) - 1) / self.turns if found else 0.0
        said = "" if found else f"{len(guesses)} guesses did not find the number; the last was {guess}."
        return Grade(
            reward, success=found, answer=str(guess), metrics={"guesses": len(guesses)}, feedback=said
        )
