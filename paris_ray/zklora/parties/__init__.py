"""The parties of ZKLoRA: what they say to each other, and the services that say it."""
