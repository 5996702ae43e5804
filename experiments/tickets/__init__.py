"""Runs over whole trainings: rounds of pruning and rewinding, averages of siblings, tickets without gradients,
planted tickets. They are built on pure functions of the library (`jaxsparse.tickets`), train many seeds at once
(`vmap`) and go on where they were stopped."""
