"""Ready-made sequence parallelism for other libraries' models; each module imports its library when it is used."""
