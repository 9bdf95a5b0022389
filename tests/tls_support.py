"""Certificates by openssl, as servers and clients of the tests show them."""

from programs_support import need, run

NEW_KEY = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def openssl(home, *arguments):
    """Run openssl in the directory ``home``."""
    need("openssl")
    run("openssl", *arguments, cwd=home)


def make_authority(home, name, certificate):
    """``certificate`` and ``name``-key.pem of one that signs itself."""
    out = ("-keyout", f"{name}-key.pem", "-out", certificate)
    openssl(home, *NEW_KEY, "-x509", "-days", "2", "-subj", f"/CN={name}", *out)


def make_certificate(home, name, certificate, *, authority, subject="localhost", names=""):
    """``certificate`` and ``name``-key.pem, signed by the (certificate, name) of an authority."""
    openssl(home, *NEW_KEY, "-subj", f"/CN={subject}", "-keyout", f"{name}-key.pem", "-out", f"{name}.req")
    (home / "names").write_text(f"subjectAltName={names}\n" if names else "")
    signer = ("-CA", authority[0], "-CAkey", f"{authority[1]}-key.pem", "-CAcreateserial", "-extfile", "names")
    openssl(home, "x509", "-req", "-days", "2", "-in", f"{name}.req", *signer, "-out", certificate)


def make_tls_dir(home):
    """What ``--tls-dir`` and libnbd look for: an authority, a server and a client of localhost."""
    make_authority(home, "ca", "ca-cert.pem")
    for name in ("server", "client"):
        make_certificate(
            home, name, f"{name}-cert.pem", authority=("ca-cert.pem", "ca"), names="DNS:localhost,IP:127.0.0.1"
        )
    return home
