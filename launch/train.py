"""`orthojax train`, from a checkout."""

from orthojax.commands.train import start

if __name__ == "__main__":
    start()
