"""What the launchers run, a file each; `python -m jaxdia NAME` runs them without the repository."""

# Imported when they are run, as each defines flags of the same names.
COMMANDS = {
  "attack": "attacks client gradients as a config says",
  "audit": "says what a server could see in an update that a client sent",
  "evaluate": "runs a study: a grid of experiments",
  "report": "writes one page about finished results",
  "text": "attacks the gradients of clients that train a language model",
}
