"""Whether two written answers are the same, judged in processes that may be killed."""
