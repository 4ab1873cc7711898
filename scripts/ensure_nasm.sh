#!/bin/sh
# Makes sure the NASM assembler is there: libjpeg-turbo's SIMD code needs it on x86.
case "$(uname -m)" in x86_64|amd64|i?86) ;; *) exit 0 ;; esac
command -v nasm >/dev/null 2>&1 && exit 0
if command -v apt-get >/dev/null 2>&1; then
  if [ "$(id -u)" = 0 ]; then as_root=""; elif sudo -n true 2>/dev/null; then as_root="sudo -n"; else as_root=no; fi
  if [ "$as_root" != no ]; then
    echo "Installing nasm (the assembler libjpeg-turbo's SIMD code needs)"
    { $as_root apt-get install -y -q nasm || { $as_root apt-get update -q && $as_root apt-get install -y -q nasm; }; } >/dev/null 2>&1
    command -v nasm >/dev/null 2>&1 && exit 0
  fi
fi
echo "imagine_opd needs the NASM assembler for fast JPEG decoding: install the package 'nasm' (apt, dnf, brew) and run again." >&2
exit 1
