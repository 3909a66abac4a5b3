"""What can be seen of a data set before anything is trained: facts, alarms, and what a study of it costs here."""
