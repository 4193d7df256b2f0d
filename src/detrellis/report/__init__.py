"""What a run does wrong, and where: a record of an evaluation, and the page that shows it."""
