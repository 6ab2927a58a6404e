"""Recipes: each public function annotated `-> RunConfig` returns a whole config, and is named model_task_hardware."""
