"""What is made (`Recipe`, `Study`) and how it is executed (`Resources`): strict, frozen, YAML in and out."""
