"""Check the installation and the shipped weights.

python scripts/doctor.py
"""

import entry  # noqa: F401  (puts the packages on the path, quiets the libraries)


def main() -> int:
    from distill.runtime.doctor import check_installation

    results = check_installation()
    print(*results, sep="\n")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
