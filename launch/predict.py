"""`orthojax predict`, from a checkout."""

from orthojax.commands.predict import start

if __name__ == "__main__":
    start()
