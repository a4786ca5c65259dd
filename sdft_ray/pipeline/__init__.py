"""From a recipe to a finished run: checks before work, the plan, the scheduler, studies, Ray jobs."""
