"""The tasks: what is trained on, what is asked, how an answer is scored. One module per task."""
