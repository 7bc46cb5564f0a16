"""A trained model in use: loaded, generating, evaluated, exported."""
