"""`orthojax evaluate`, from a checkout."""

from orthojax.commands.evaluate import start

if __name__ == "__main__":
    start()
