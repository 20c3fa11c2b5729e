"""What is present and what will therefore be used: python scripts/doctor.py"""

import entry  # noqa: F401  (finds the packages, quiets the libraries)


def main() -> int:
    from distill.runtime.doctor import examine

    findings = examine()
    for finding in findings:
        print(
            f"{'ok  ' if finding.good else 'none' if finding.optional else 'FAIL'}  {finding.name:22} {finding.text}"
        )
    return int(any(not finding.good and not finding.optional for finding in findings))


if __name__ == "__main__":
    raise SystemExit(main())
