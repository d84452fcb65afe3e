#!/usr/bin/env bash
# Software Vulkan for machines without a GPU: Mesa's lavapipe, version 25 or later, in a folder of your own (no root).
# SAPIEN, ManiSkill's renderer, does not accept the Mesa 22.3 of Debian 12; the one in Debian's backports works.
#
#   scripts/setup_software_vulkan.sh           set up (once; about 60 MB of downloads), print the export lines
#   scripts/setup_software_vulkan.sh --force   set up again
#
# embodied_rl finds the folder by itself (simulators/vulkan.py); the export lines are for other programs.
# The folder holds the driver and all its libraries but glibc and libstdc++, so nothing of the system is touched.
set -euo pipefail

MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
target=${XDG_CACHE_HOME:-$HOME/.cache}/embodied_rl/vulkan
icd=$target/lvp_icd.json

fail() { echo "setup_software_vulkan: $*" >&2; exit 1; }

print_exports() {
    echo "export VK_DRIVER_FILES='$icd' VK_ICD_FILENAMES='$icd' LP_NUM_THREADS=1"
}

if [[ -f $icd && ${1:-} != --force ]]; then
    print_exports
    exit 0
fi
[[ $(uname -s) == Linux ]] || fail "lavapipe is set up on Linux only"
for tool in apt-get apt-cache dpkg dpkg-deb ldd; do
    command -v "$tool" >/dev/null || fail "$tool is missing (not Debian or Ubuntu?); install Mesa >= 25 with lavapipe from \
your distribution and set VK_DRIVER_FILES to its lvp_icd.json"
done

work=$(mktemp -d)
built=$target.$$
trap 'fail "line $LINENO failed: $(tail -n 1 "$work/log")"' ERR
trap 'rm -rf "$work" "$built"' EXIT
mkdir -p "$work"/{lists/partial,archives/partial,debs,root} "$built"

# apt with package lists of its own: the system's sources and packages stay as they are, and root is not needed.
cat >"$work/apt.conf" <<CONF
Dir::Etc::SourceList "$work/debian.sources";
Dir::Etc::SourceParts "-";
Dir::State::Lists "$work/lists";
Dir::Cache "$work";
Acquire::Retries "3";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
Acquire::Languages "none";
APT::Sandbox::User "";
CONF

keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if [[ ! -f $keyring ]]; then # Ubuntu: fetch Debian's keys as a package of its own, checked by Ubuntu's keys
    (cd "$work/debs" && timeout 120 apt-get -q download debian-archive-keyring >/dev/null 2>"$work/log") ||
        fail "Debian's archive keys are missing; install the package debian-archive-keyring ($(tail -n 1 "$work/log"))"
    dpkg-deb -x "$work"/debs/debian-archive-keyring*.deb "$work/keys"
    rm "$work"/debs/*
    keyring=$work/keys/usr/share/keyrings/debian-archive-keyring.gpg
fi
cat >"$work/debian.sources" <<SOURCES
Types: deb
URIs: $MIRROR
Suites: bookworm bookworm-backports
Components: main
Signed-By: $keyring
SOURCES

export APT_CONFIG=$work/apt.conf
timeout 300 apt-get -q -o APT::Update::Error-Mode=any update >"$work/log" 2>&1 || fail "no package lists from $MIRROR: $(tail -n 1 "$work/log")"
mesa=$(apt-cache madison mesa-vulkan-drivers | awk -F' *[|] *' '/bookworm-backports/ {print $2}' | head -n 1)
[[ -n $mesa ]] || fail "$MIRROR has no mesa-vulkan-drivers in bookworm-backports for $(dpkg --print-architecture)"

# The driver, the libraries behind it, and patchelf, which makes them find each other by their own folder.
core='^(libc6|libgcc-s1|libstdc\+\+6)$'
libraries=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
    --no-enhances "mesa-vulkan-drivers=$mesa" | grep -E '^(lib|zlib)' | sort -u | grep -vE "$core")
# shellcheck disable=SC2086 # one word per package
(cd "$work/debs" && timeout 600 apt-get -q download "mesa-vulkan-drivers=$mesa" patchelf $libraries) >"$work/log" 2>&1 ||
    fail "download from $MIRROR failed: $(grep -E '^E:' "$work/log" | head -n 1)"
for deb in "$work"/debs/*.deb; do
    dpkg-deb -x "$deb" "$work/root"
done

driver=$(find "$work/root" -name libvulkan_lvp.so -print -quit)
folders=$(dirname "$driver"):$work/root/lib/$(basename "$(dirname "$driver")")
LD_LIBRARY_PATH=$folders ldd "$driver" 2>&1 | awk -v root="$work/" 'index($3, root) == 1 {print $3}' | xargs cp -Lt "$built" "$driver"
find "$built" -type f -exec "$work/root/usr/bin/patchelf" --set-rpath "\$ORIGIN" {} \;
missing=$(ldd "$built/libvulkan_lvp.so" 2>&1 | grep -E 'not found' || true)
[[ -z $missing ]] || fail "this system is too old for Debian 12's libraries: $(head -n 1 <<<"$missing" | xargs)"
cat >"$built/lvp_icd.json" <<JSON
{"file_format_version": "1.0.0", "ICD": {"library_path": "$target/libvulkan_lvp.so", "api_version": "1.3.0"}}
JSON

rm -rf "$target"
mv -T "$built" "$target"
echo "Mesa $mesa is in $target" >&2
print_exports
