"""A guessing game: the model looks for a number and is told after each guess to go higher or lower."""

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
        """Returns the next messages, or None to end the conversation; a slow answer may be a future."""
        guess, guesses = guess_in(transcript[-1]), transcript[::2]
        if guess == int(problem.answer) or len(guesses) == self.turns:
            return None
        hint = "That is no number." if guess is None else "Lower."
        if guess is not None and guess < int(problem.answer):
            hint = "Higher."
        return [{"role": "user", "content": hint}]

    def grade(self, problems, transcripts):
        """Gives higher rewards for fewer guesses; rewards may be any numbers."""
        return [self.grade_one(*each) for each in zip(problems, transcripts, strict=True)]

    def grade_one(self, problem, transcript):
        guess, guesses = guess_in(transcript[-1]), transcript[::2]
        found = guess == int(problem.answer)
        reward = 1 - (len(guesses) - 1) / self.turns if found else 0.0
        said = "" if found else f"{len(guesses)} guesses did not find the number; the last was {guess}."
        return Grade(
            reward, success=found, answer=str(guess), metrics={"guesses": len(guesses)}, feedback=said
        )
