# Process 1 of a machine that boots a disk. The machine's command is its child, has the disk served and
# mounted, and names the mount here; then process 1 becomes the systemd of that disk, as at the end of
# an initramfs. What the command has started keeps the root that it has.
set -e
. /run/pyublk-vm/settings
bb=$busybox
$bb mkfifo /run/pyublk-vm/boot
exec 3<>/run/pyublk-vm/boot # for both, so that it does not wait for a writer
$bb sh /run/pyublk-vm/command.sh 3<&- &
until read -r root <&3; do # a child's end interrupts it
    :
done
exec 3<&-
for place in dev proc sys run; do
    $bb mount -o rbind "/$place" "$root/$place"
done
cd "$root"
$bb mount -o move . /
exec $bb chroot . /lib/systemd/systemd --log-target=journal --show-status=0
