"""One dense model against isolated experts: plan, numbers and page of a study, without Ray."""
