"""The Ray Serve application: a finished bundle in, an OpenAI-shaped image API and a page out."""
